//! `Config` x `Topology` -> `Plan`: a pure function.
#![forbid(unsafe_code)]
