//! One process, the embedded default.
