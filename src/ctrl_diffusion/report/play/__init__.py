"""The page of `ctrl play`, on which a control is turned by hand."""
