"""The page of `calm playground`: one prompt, the answers of every part side by side, and what the connections did."""
