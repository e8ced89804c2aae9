//! The other end of a netdev that hands the guest's memory to another process.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A minimal vhost-user backend that QEMU accepts to start a netdev.
pub(super) struct VhostUser {
    pub(super) path: PathBuf,
}

impl VhostUser {
    pub(super) fn listen(path: &Path) -> VhostUser {
        let listener = UnixListener::bind(path).expect("a socket");
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                // Until QEMU ends.
                let _ = VhostUser::serve(connection);
            }
        });
        VhostUser { path: path.into() }
    }

    /// Messages are a request's number, flags and the body's size, 32 bits each, and the body
    /// (QEMU, docs/interop/vhost-user.rst).
    fn serve(mut connection: UnixStream) -> std::io::Result<()> {
        const GET_FEATURES: u32 = 1;
        const REPLY: u32 = 1 | 1 << 2;
        const VIRTIO_F_VERSION_1: u64 = 1 << 32;
        loop {
            let mut header = [[0; 4]; 3];
            connection.read_exact(header.as_flattened_mut())?;
            let [request, _, size] = header.map(u32::from_le_bytes);
            connection.read_exact(&mut vec![0; size as usize])?;
            if request == GET_FEATURES {
                let header = [GET_FEATURES, REPLY, 8].map(u32::to_le_bytes);
                connection.write_all(header.as_flattened())?;
                connection.write_all(&VIRTIO_F_VERSION_1.to_le_bytes())?;
            }
        }
    }
}
