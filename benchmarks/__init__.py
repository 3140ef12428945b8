"""What the rooms cost and what they give, measured side by side."""
