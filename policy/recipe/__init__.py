"""The search for the recipe (settings of a policy and of its training) that suits the data best."""
