"""What a run was told: the typed schema, its loading and checks, and the YAML recipes beside this file."""
