"""Self-contained pages that show plans and loads: their parts, and the function that joins them."""
