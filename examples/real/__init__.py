"""The whole method on a pretrained chat model, with nothing but a package index (`make real`)."""
