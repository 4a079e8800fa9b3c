"""A package of somebody else's that depends on data-handler."""
