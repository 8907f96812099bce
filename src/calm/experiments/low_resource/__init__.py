"""Translation from low-resource languages to English (paper section 4.2), on the messages of real software."""
