"""Other software that runs our layers: PEFT, transformers.Trainer, tensor parallelism."""
