"""A run: a recipe carried out in a folder, stage by stage; sweeps of many; and what is known before one begins."""
