"""Code understanding and generation (paper section 4.3): Python, and Emacs Lisp, which small models hardly know."""
