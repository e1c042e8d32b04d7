//! A certificate authority of a test's own.

use std::fs;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use tempfile::TempDir;

/// Its files go when it is dropped.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: TempDir,
}

impl Authority {
    pub fn new() -> Self {
        let mut parameters = named("an authority", &[]);
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let issuer = CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("authority.pem"), issuer.pem()).unwrap();
        Self { issuer, folder }
    }

    /// File of its own certificate.
    pub fn certificate(&self) -> String {
        self.path("authority.pem")
    }

    /// Files of a server's certificate and key, for addresses of this machine.
    pub fn server(&self) -> (String, String) {
        self.issue("server", &["127.0.0.1", "localhost"], ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// Files of a client's certificate and key.
    pub fn client(&self) -> (String, String) {
        self.issue("client", &[], ExtendedKeyUsagePurpose::ClientAuth)
    }

    fn issue(&self, name: &str, addresses: &[&str], purpose: ExtendedKeyUsagePurpose) -> (String, String) {
        let mut parameters = named(name, addresses);
        parameters.extended_key_usages = vec![purpose];
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        let files = (self.path(&format!("{name}.pem")), self.path(&format!("{name}.key")));
        fs::write(&files.0, certificate.pem()).unwrap();
        fs::write(&files.1, key.serialize_pem()).unwrap();
        files
    }

    fn path(&self, file: &str) -> String {
        self.folder.path().join(file).to_str().unwrap().to_owned()
    }
}

/// A name of its own: one with its issuer's name would pass for self-signed.
fn named(name: &str, addresses: &[&str]) -> CertificateParams {
    let addresses: Vec<_> = addresses.iter().map(|&address| address.to_owned()).collect();
    let mut parameters = CertificateParams::new(addresses).unwrap();
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters
}
