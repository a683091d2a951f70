"""Other libraries' ways of saving and loading, on top of a store. Each module is imported only when used, and needs its library."""
