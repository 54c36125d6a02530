"""Plans of conversions: compile names, shapes and rules to proved plans of strided copies."""
