//! How the two sides reach each other: addresses ([`uri`]), look-ups, connections that are given ([`single`]), lanes
//! until a ring takes over ([`lane`]), TLS below them ([`tls`]) and who may connect above them ([`secure`]).

pub(crate) mod lane;
pub(crate) mod limits;
pub(crate) mod lookup;
pub(crate) mod secure;
pub(crate) mod single;
pub(crate) mod tls;
pub(crate) mod uri;
