"""The small open model that ships, and the recipe that made it."""
