//! How the two sides connect: addresses ([`uri`]), look-ups, inherited connections ([`single`]),
//! lanes until a ring takes over ([`lane`]), peers of other protocols ([`foreign`]), TLS below
//! lanes ([`tls`]) and authentication above them ([`secure`]).

mod foreign;
pub(crate) mod lane;
pub(crate) mod limits;
pub(crate) mod lookup;
pub(crate) mod secure;
pub(crate) mod single;
pub(crate) mod tls;
pub(crate) mod uri;
