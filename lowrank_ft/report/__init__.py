"""What people look at: the HTML report, its plots, the model card."""
