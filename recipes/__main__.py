"""`python -m recipes` lists the recipes."""

from recipes.listing import all_recipes

if __name__ == "__main__":
    for name, listing in all_recipes():
        print(listing.as_text(name), end="\n\n")
    print("Durations: two CPU cores, everything included. All settings: python -m recipes.<name> --help")
