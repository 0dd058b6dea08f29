//! A disk's listening socket: bound to a path that is removed again, or inherited as a descriptor.

use std::fs;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Why a socket could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody answers there.
    #[error("cannot listen on {path}: another process is serving this socket")]
    Taken {
        /// The path.
        path: PathBuf,
    },
    /// A file that is not a socket is there.
    #[error(
        "cannot listen on {path}: a file that is not a socket exists there (remove it or choose another path)"
    )]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot listen on {path}: {error}")]
    Bind {
        /// The path.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The inherited descriptor is no listening UNIX stream socket.
    #[error("cannot use file descriptor {fd} as a listening socket: {reason}")]
    BadDescriptor {
        /// The number.
        fd: RawFd,
        /// What is wrong with it.
        reason: String,
    },
}

/// A listening socket. Dropping it removes the path that it made.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    path: Option<PathBuf>,
}

impl Listener {
    /// Binds to `path`. A socket that nobody serves any more is replaced.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn bind(path: &Path) -> Result<Listener, SocketError> {
        let error = |error| SocketError::Bind {
            path: path.to_owned(),
            error,
        };
        match fs::symlink_metadata(path) {
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(SocketError::NotASocket {
                    path: path.to_owned(),
                });
            }
            Ok(_) => match UnixStream::connect(path) {
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).map_err(error)?
                }
                _ => {
                    return Err(SocketError::Taken {
                        path: path.to_owned(),
                    });
                }
            },
            Err(_) => {}
        }
        let listener = UnixListener::bind(path).map_err(error)?;
        Ok(Listener {
            listener,
            path: Some(path.to_owned()),
        })
    }

    /// The same for this user and root alone.
    ///
    /// # Errors
    /// [`SocketError`].
    pub fn bind_private(path: &Path) -> Result<Listener, SocketError> {
        let listener = Listener::bind(path)?;
        let private = fs::Permissions::from_mode(0o600);
        fs::set_permissions(path, private).map_err(|error| SocketError::Bind {
            path: path.to_owned(),
            error,
        })?;
        Ok(listener)
    }

    /// Takes over an already listening socket (systemd activation).
    ///
    /// # Errors
    /// [`SocketError::BadDescriptor`].
    pub fn inherit(fd: RawFd) -> Result<Listener, SocketError> {
        let bad = |reason: String| SocketError::BadDescriptor { fd, reason };
        // SAFETY: fcntl with F_GETFD touches no memory; it tells whether the number is an open descriptor.
        if fd < 0 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            return Err(bad("it is not open".to_owned()));
        }
        // SAFETY: the descriptor is open, and the user gave it to this disk alone (the configuration refuses a number
        // that is named twice).
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        let listening = rustix::net::sockopt::socket_acceptconn(&owned).unwrap_or(false);
        let unix = rustix::net::sockopt::socket_domain(&owned)
            .is_ok_and(|d| d == rustix::net::AddressFamily::UNIX);
        if !(listening && unix) {
            return Err(bad("it is not a listening UNIX stream socket".to_owned()));
        }
        let listener = UnixListener::from(owned);
        listener
            .set_nonblocking(false)
            .map_err(|error| bad(error.to_string()))?;
        Ok(Listener {
            listener,
            path: None,
        })
    }

    /// The socket.
    #[must_use]
    pub fn socket(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.path
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove the socket");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temp(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("tandem-socket-{}-{name}", std::process::id()))
    }

    #[test]
    fn bind_on_a_served_socket_is_taken_and_on_a_stale_one_works() {
        let path = temp("taken");
        let first = Listener::bind(&path).unwrap();
        assert!(matches!(
            Listener::bind(&path),
            Err(SocketError::Taken { .. })
        ));
        assert!(path.exists());
        drop(first);
        assert!(!path.exists());
        drop(UnixListener::bind(&path).unwrap()); // leaves its file behind
        assert!(path.exists());
        drop(Listener::bind(&path).unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn bind_on_a_regular_file_keeps_the_file() {
        let path = temp("file");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(
            Listener::bind(&path),
            Err(SocketError::NotASocket { .. })
        ));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn inherit_of_a_closed_or_foreign_descriptor_is_refused() {
        assert!(matches!(
            Listener::inherit(-1),
            Err(SocketError::BadDescriptor { .. })
        ));
        assert!(matches!(
            Listener::inherit(987),
            Err(SocketError::BadDescriptor { .. })
        ));
        let file = OwnedFd::from(fs::File::open("/proc/self/exe").unwrap());
        let fd = std::os::fd::IntoRawFd::into_raw_fd(file);
        assert!(matches!(
            Listener::inherit(fd),
            Err(SocketError::BadDescriptor { .. })
        ));
    }
}
