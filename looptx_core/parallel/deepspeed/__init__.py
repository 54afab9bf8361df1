"""All that rests on DeepSpeed's internals. No other module of looptx imports deepspeed."""
