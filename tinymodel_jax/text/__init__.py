"""From text to rows of token ids, and back."""
