"""`python -m recipes`: the recipes there are. `--markdown` prints them as the table of the README."""

import sys

from recipes.registry import all_recipes, as_markdown, as_text

if __name__ == "__main__":
    if "--markdown" in sys.argv[1:]:
        print(as_markdown(all_recipes()))
    else:
        print(as_text(all_recipes()), end="\n\n")
        print("Durations: two CPU cores, everything included. Any setting: python -m recipes.<name> --help")
