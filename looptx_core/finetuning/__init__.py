"""Finetuning: adapters by PEFT, quantised bases by bitsandbytes, the trainer of `training`."""
