"""How others name the weights of each family: tables of names in both directions."""
