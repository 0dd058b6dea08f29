//! The `tandem` binary: parse arguments, run, exit code.

fn main() {}
