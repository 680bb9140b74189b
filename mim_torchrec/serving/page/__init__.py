"""The page for people: whom the model knows, how content changes what it shows them, and why."""
