//! What TLS has against the other side of a connection, behind the errors of those who tried to connect.

use std::error::Error;
use std::io;

use rustls::AlertDescription;

/// That trying again is of no use, and whose certificate is to blame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The server's: nobody who is trusted issued it, it names another host, or its time is over.
    OfServer,
    /// The one that is shown to the server, or none is.
    OfClient,
}

/// Whether one side does not take the other's certificate; `None` for every other failure.
pub(crate) fn refusal(error: &(dyn Error + 'static)) -> Option<Refusal> {
    match complaint(error)? {
        rustls::Error::InvalidCertificate(_) => Some(Refusal::OfServer),
        rustls::Error::AlertReceived(
            AlertDescription::CertificateRequired
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied,
        ) => Some(Refusal::OfClient),
        _ => None,
    }
}

/// The complaint of TLS that is behind a failure to connect.
pub(crate) fn complaint<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(complaint) = error.downcast_ref() {
            return Some(complaint);
        }
        // The source of an I/O error is what stands behind the error within.
        let within = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = within.map_or_else(|| error.source(), |within| Some(within));
    }
    None
}

#[cfg(test)]
mod tests {
    use rustls::CertificateError;

    use super::*;

    #[test]
    fn the_complaint_is_found_however_deep_it_is() {
        let refused = |error: rustls::Error| {
            let error = io::Error::other(io::Error::new(io::ErrorKind::InvalidData, error));
            let status = tonic::Status::from_error(Box::new(error));
            refusal(&status)
        };
        let issuer = CertificateError::UnknownIssuer;
        assert_eq!(refused(rustls::Error::InvalidCertificate(issuer)), Some(Refusal::OfServer));
        assert_eq!(refused(rustls::Error::AlertReceived(AlertDescription::BadCertificate)), Some(Refusal::OfClient));
        assert_eq!(refused(rustls::Error::AlertReceived(AlertDescription::InternalError)), None);
        assert_eq!(refusal(&io::Error::other("refused")), None);
    }
}
