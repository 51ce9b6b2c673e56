"""The C++ library and what calls it."""
