"""Training scripts, installed as ``lowrank_ft_recipes`` so that ``lowrank-ft finetune`` finds them."""
