"""What a model does with prompts: completions, judges, rates with intervals, and corrections compared by them."""
