//! How the two sides connect: addresses ([`uri`]), look-ups, inherited connections ([`single`]),
//! lanes until a ring takes over ([`lane`]), TLS below lanes ([`tls`]) and authentication above
//! them ([`secure`]).

pub(crate) mod lane;
pub(crate) mod limits;
pub(crate) mod lookup;
pub(crate) mod secure;
pub(crate) mod single;
pub(crate) mod tls;
pub(crate) mod uri;
