"""How each method hooks into training: the trainer mixin, the callbacks, the corrections of saved adapters and the report."""
