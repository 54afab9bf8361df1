"""Training: a LightningModule and callbacks that fit any Lightning Trainer."""
