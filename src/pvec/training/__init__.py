"""LoRA finetuning with steering, and a persona that is watched while it trains."""
