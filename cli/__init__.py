"""The command line, installed as ``lowrank_ft_cli``."""
