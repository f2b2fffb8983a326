"""HDF5: recordings of LIBERO and of ALOHA."""
