"""Cards in the forms that others ask for: bills of materials, model cards, official forms."""
