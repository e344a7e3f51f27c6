"""What runs give, and the forms that it is shown in; imports no run."""
