//! TLS of the connection to NATS, by the variables that Dynamo itself reads.

use std::io;
use std::path::Path;
use std::sync::Arc;

use async_nats::{ConnectError, ConnectOptions};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use tracing::warn;

use super::error::NatsError;
use super::options::TlsOptions;
use crate::tls::{self, Refusal};

pub(super) const CA: &str = "--nats-ca [NATS_TLS_CA_CERT_PATH]";
pub(super) const CLIENT_CERT: &str = "--nats-client-cert [NATS_TLS_CLIENT_CERT_PATH]";
pub(super) const CLIENT_KEY: &str = "--nats-client-key [NATS_TLS_CLIENT_KEY_PATH]";

/// What the bridge shows to the server.
type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// Makes the options do TLS as it is configured. The client reads the files again for each connection; here they are read
/// so that a wrong one ends the start.
///
/// # Errors
/// A file that cannot be read, or that holds something else.
pub(super) fn apply(tls: &TlsOptions, mut options: ConnectOptions) -> Result<ConnectOptions, NatsError> {
    if tls.nats_tls_first {
        options = options.tls_first();
    }
    if !tls.is_given() {
        return Ok(options);
    }
    // Credentials do not travel in the clear where somebody took care of certificates.
    options = options.require_tls(true);
    let roots = tls.nats_ca.as_deref().map(roots).transpose()?.unwrap_or_else(RootCertStore::empty);
    let identity = match (&tls.nats_client_cert, &tls.nats_client_key) {
        (Some(certificate), Some(key)) => Some((certificates(CLIENT_CERT, certificate)?, private_key(key)?)),
        _ => None,
    };
    let config = client_config(roots, identity, tls.nats_tls_insecure)?;
    if tls.nats_tls_insecure {
        warn!("The certificate of the NATS server is not verified: --nats-tls-insecure [NATS_TLS_INSECURE]");
        return Ok(options.tls_client_config(config));
    }
    if let Some(path) = &tls.nats_ca {
        options = options.add_root_certificates(path.clone());
    }
    if let (Some(certificate), Some(key)) = (&tls.nats_client_cert, &tls.nats_client_key) {
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    Ok(options)
}

/// It fails where certificate and key do not belong together.
fn client_config(roots: RootCertStore, identity: Option<Identity>, insecure: bool) -> Result<ClientConfig, NatsError> {
    let config = ClientConfig::builder();
    let provider = Arc::clone(config.crypto_provider());
    let config = if insecure {
        config.dangerous().with_custom_certificate_verifier(Arc::new(Unverified(provider)))
    } else {
        config.with_root_certificates(roots)
    };
    match identity {
        Some((certificate, key)) => config.with_client_auth_cert(certificate, key).map_err(|error| {
            NatsError::Certificates { detail: error.to_string(), option: "--nats-client-cert [NATS_TLS_CLIENT_CERT_PATH] and --nats-client-key [NATS_TLS_CLIENT_KEY_PATH]" }
        }),
        None => Ok(config.with_no_client_auth()),
    }
}

fn roots(path: &Path) -> Result<RootCertStore, NatsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(CA, path)? {
        roots.add(certificate).map_err(|error| NatsError::file(CA, path, io::Error::other(error)))?;
    }
    Ok(roots)
}

/// At least one: the client would trust nobody, or show nothing, and complain of the network.
fn certificates(option: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, NatsError> {
    let pem = std::fs::read(path).map_err(|error| NatsError::file(option, path, error))?;
    let found = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>();
    let found = found.map_err(|error| NatsError::file(option, path, io::Error::other(error)))?;
    if found.is_empty() {
        return Err(NatsError::file(option, path, io::Error::other("it holds no PEM certificate")));
    }
    Ok(found)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, NatsError> {
    let pem = std::fs::read(path).map_err(|error| NatsError::file(CLIENT_KEY, path, error))?;
    PrivateKeyDer::from_pem_slice(&pem)
        .map_err(|_| NatsError::file(CLIENT_KEY, path, io::Error::other("it holds no PEM private key")))
}

/// What to change where one side does not take the other's certificate: trying again is of no use. `None` for every other
/// failure.
pub(super) fn refusal(error: &ConnectError) -> Option<&'static str> {
    Some(match tls::refusal(error)? {
        Refusal::OfServer => {
            "--nats-ca [NATS_TLS_CA_CERT_PATH], and that the certificate names the host in --nats-server [NATS_SERVER]"
        }
        Refusal::OfClient => {
            "--nats-client-cert [NATS_TLS_CLIENT_CERT_PATH] and --nats-client-key [NATS_TLS_CLIENT_KEY_PATH]"
        }
    })
}

/// What a failure to connect has to do with when TLS begins, as far as it can be told.
pub(super) fn hint(error: &ConnectError) -> &'static str {
    if matches!(tls::complaint(error), Some(Error::InvalidMessage(_))) {
        return " (the server does not begin with TLS: check tls:// in --nats-server [NATS_SERVER] and --nats-tls-first)";
    }
    // The client's own words for a server that waits for the handshake.
    if error.to_string().contains("expected INFO, got nothing") {
        return " (a server that wants TLS first needs --nats-tls-first)";
    }
    ""
}

/// Takes every certificate, but still has the server prove that it has the key of the one that it shows.
#[derive(Debug)]
struct Unverified(Arc<CryptoProvider>);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
