"""The dictionary domain: m_A knows a language's words, only the anchor knows how English inflects them."""
