//! Which pages a file's memory has: huge ones (hugetlbfs, or a memfd with MFD_HUGETLB), or others.

use std::fmt;
use std::fs::File;
use std::io;

use rustix::fs::fstatfs;

const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// The pages of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pages {
    /// Of this many bytes each.
    Huge(u64),
    /// The number of their file system.
    Ordinary(u64),
}

impl Pages {
    /// Bytes of one, if they are huge.
    pub(super) fn huge(self) -> Option<u64> {
        match self {
            Pages::Huge(bytes) => Some(bytes),
            Pages::Ordinary(_) => None,
        }
    }

    fn of(magic: u64, block: u64) -> Pages {
        match magic {
            HUGETLBFS_MAGIC if block.is_power_of_two() => Pages::Huge(block),
            _ => Pages::Ordinary(magic),
        }
    }
}

impl fmt::Display for Pages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Pages::Huge(bytes) => write!(f, "huge pages of {} KiB", bytes >> 10),
            Pages::Ordinary(TMPFS_MAGIC) => write!(f, "a memfd or tmpfs without hugetlb"),
            Pages::Ordinary(magic) => write!(f, "a file system of type {magic:#x}"),
        }
    }
}

/// The pages of `file`.
///
/// # Errors
/// As the system answers.
pub(super) fn pages_of(file: &File) -> io::Result<Pages> {
    let found = fstatfs(file)?;
    let number = |value: i64| u64::try_from(value).unwrap_or(0);
    Ok(Pages::of(number(found.f_type), number(found.f_bsize)))
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    #[test]
    fn pages_of_memfds_are_told_apart_also_where_none_is_free() {
        let made = |flags| File::from(memfd_create("pages", MemfdFlags::CLOEXEC | flags).unwrap());
        let ordinary = pages_of(&made(MemfdFlags::empty())).unwrap();
        assert_eq!(ordinary.huge(), None);
        assert_eq!(ordinary.to_string(), "a memfd or tmpfs without hugetlb");
        // Making the file takes none of its pages.
        let huge = pages_of(&made(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)).unwrap();
        assert_eq!(huge.huge(), Some(2 << 20));
        assert_eq!(huge.to_string(), "huge pages of 2048 KiB");
    }

    #[test]
    fn pages_of_other_file_systems_are_ordinary() {
        const EXT4: u64 = 0xef53;
        assert_eq!(
            Pages::of(EXT4, 4096).to_string(),
            "a file system of type 0xef53"
        );
        assert_eq!(Pages::of(HUGETLBFS_MAGIC, 0).huge(), None);
        assert_eq!(Pages::of(HUGETLBFS_MAGIC, 1 << 30).huge(), Some(1 << 30));
    }
}
