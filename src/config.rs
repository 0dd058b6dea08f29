//! What the user asked for: TOML file and flags become one `Config`.
#![forbid(unsafe_code)]
