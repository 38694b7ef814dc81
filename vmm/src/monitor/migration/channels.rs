//! The monitor's part in its sealed memory channels: whom it lets in, and whom it talks to.
//!
//! The key is this process's own; the other side's certificate is known by the fingerprint that `clusterd`
//! passes on from the other node.

use std::net::SocketAddr;
use std::sync::Arc;

use cluster_model::ids::MigrationId;
use migration_core::tls::{
    AlreadyProved, ExpectedSource, Fingerprint, SetupError, TlsAcceptor, TlsConnector,
};
use migration_core::{Acceptor, Connector, TcpConnector};
use proto::monitor as wire;

use super::super::Monitor;
use super::sink::Listeners;
use super::{Migration, Side};

/// Bytes of a fingerprint.
pub(super) const FINGERPRINT_BYTES: usize = 32;

/// Why a destination does not expect that source.
#[derive(Debug, thiserror::Error)]
pub enum ExpectError {
    /// Not a SHA-256.
    #[error(
        "cannot expect a source by {0} bytes: the fingerprint of its certificate has {FINGERPRINT_BYTES}"
    )]
    Malformed(usize),
    /// It receives another migration, or none.
    #[error("this monitor does not receive migration {0}")]
    Unknown(MigrationId),
    /// Another source is there already.
    #[error("cannot expect another source for this migration: {0}")]
    AlreadyProved(#[from] AlreadyProved),
}

impl Monitor {
    /// Lets in the source with that certificate, and no other. Saying it again changes nothing.
    ///
    /// # Errors
    /// See [`ExpectError`].
    pub fn expect_source(&self, request: &wire::ExpectSourceRequest) -> Result<(), ExpectError> {
        let bytes = request.fingerprint.as_slice();
        let announced =
            Fingerprint::try_from(bytes).map_err(|_| ExpectError::Malformed(bytes.len()))?;
        let id = MigrationId(request.migration_id);
        match &self.lock().migration {
            Some(Migration {
                id: ours,
                side: Side::Receiving { expected, .. },
                ..
            }) if *ours == id => expected.announce(announced)?,
            _ => return Err(ExpectError::Unknown(id)),
        }
        tracing::debug!(migration = %id, source = %announced, "a source is expected");
        Ok(())
    }

    /// Makes sealed connections to the monitor with that certificate.
    pub(super) fn connector(
        &self,
        addresses: Vec<SocketAddr>,
        destination: Fingerprint,
    ) -> Result<Arc<dyn Connector>, SetupError> {
        let tcp = TcpConnector { addresses };
        Ok(Arc::new(TlsConnector::new(
            tcp,
            &self.identity,
            destination,
        )?))
    }

    /// Takes sealed connections from the source that `expected` is told of.
    pub(super) fn acceptor(
        &self,
        listeners: Listeners,
        expected: ExpectedSource,
    ) -> Result<Arc<dyn Acceptor>, SetupError> {
        Ok(Arc::new(TlsAcceptor::new(
            listeners,
            &self.identity,
            expected,
        )?))
    }
}
