"""The paper's key-value arithmetic (section 4.1) at a size that two CPU cores carry: data, bases, compositions, table."""
