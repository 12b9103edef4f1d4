//! The broker contract as a test suite.
