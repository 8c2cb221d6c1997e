"""Numbers in, numbers out: moments and their merge, population statistics, gaps."""
