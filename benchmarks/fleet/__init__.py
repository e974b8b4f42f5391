"""A fleet of real data sets: `make fleet` runs every strategy on each, beside the truth."""
