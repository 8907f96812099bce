"""The paper's key-value arithmetic (section 4.1) at a size for two CPU cores: data, bases, compositions, table."""
