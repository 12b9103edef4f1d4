//! Redis pub/sub between any number of nodes.
