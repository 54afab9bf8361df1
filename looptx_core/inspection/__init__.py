"""What the loops of a trained model do: measures, calibration, exits compared, traces, reports."""
