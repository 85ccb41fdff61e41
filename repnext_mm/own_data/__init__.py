"""From a folder of images to a config: which model, trained how, and why."""
